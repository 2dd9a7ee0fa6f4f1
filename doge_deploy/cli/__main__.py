"""`python -m doge_deploy.cli`: the command line where its script is not on the path."""

from doge_deploy.cli.main import main

main()
