"""The administrator's side of the cluster: one module for each thing that it drives."""
