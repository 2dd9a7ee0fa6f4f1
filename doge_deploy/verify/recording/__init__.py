"""What a reference once answered, in a file: `doge-deploy record` writes it, `verify --recording` judges by it."""
