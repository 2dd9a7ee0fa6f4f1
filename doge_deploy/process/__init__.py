"""Work in other processes, and how a long command reports what it is doing."""
