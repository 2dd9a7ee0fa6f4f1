"""What a long command has to do with processes: the progress that it reports."""
