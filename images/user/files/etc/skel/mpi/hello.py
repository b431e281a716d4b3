"""Say who runs where: srun --mpi=pmix --partition=shared --nodes=2 --ntasks=4 python3 hello.py"""

from mpi4py import MPI

world = MPI.COMM_WORLD
print(f"process {world.rank} of {world.size} on {MPI.Get_processor_name()}")
