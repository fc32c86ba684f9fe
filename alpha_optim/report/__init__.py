"""Pictures of histories; reads, and nothing else."""
