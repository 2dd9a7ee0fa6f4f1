"""The order of the steps of an export and of a build, and nothing else."""
