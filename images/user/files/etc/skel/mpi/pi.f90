! Compute pi as the integral of 4 / (1 + x**2) from 0 to 1, each process its share of the intervals.
program pi
    use mpi
    implicit none
    integer, parameter :: intervals = 100000000
    integer :: error, rank, ranks, i
    double precision :: part, whole, x

    call MPI_Init(error)
    call MPI_Comm_rank(MPI_COMM_WORLD, rank, error)
    call MPI_Comm_size(MPI_COMM_WORLD, ranks, error)
    part = 0
    do i = rank + 1, intervals, ranks
        x = (i - 0.5d0) / intervals
        part = part + 4 / (1 + x * x)
    end do
    call MPI_Reduce(part, whole, 1, MPI_DOUBLE_PRECISION, MPI_SUM, 0, MPI_COMM_WORLD, error)
    if (rank == 0) print '(a, f17.15, a, i0, a)', 'pi is ', whole / intervals, ', computed by ', ranks, ' processes'
    call MPI_Finalize(error)
end program pi
