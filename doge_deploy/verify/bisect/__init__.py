"""Two bundles of one checkpoint, or two environments: the first weight, pass or package that makes the difference."""
