"""Containers of users: on this machine's engine, or where there is a cluster, in Slurm jobs on its workers.

`names` says how they are called, `place` what a place of containers can do; `local` and `cluster` are the two places.
`manager` is the verbs of `cm` over any place, and `cm` its command line.
"""
