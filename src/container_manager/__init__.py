"""Containers of users: on this machine's engine where there is no cluster, in Slurm jobs on its workers where there is one.

`names` says how they are called, `place` what a place of containers can do; `local` and `cluster` are the two places.
`manager` is the verbs of `cm` over any place, and `cm` its command line.
"""
