// Send a token once around all processes, each of which adds its number, and say how long that took.
#include <mpi.h>
#include <stdio.h>

int main(int count, char **arguments) {
    int rank, size, token = 0;
    MPI_Init(&count, &arguments);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    double start = MPI_Wtime();
    if (rank > 0) {
        MPI_Recv(&token, 1, MPI_INT, rank - 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        token += rank;
    }
    if (size > 1) MPI_Send(&token, 1, MPI_INT, (rank + 1) % size, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        if (size > 1) MPI_Recv(&token, 1, MPI_INT, size - 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        printf("the token came back as %d after %.1f microseconds\n", token, (MPI_Wtime() - start) * 1e6);
    }
    MPI_Finalize();
    return 0;
}
