"""The command line; the only package that imports click. One command a file, loaded when it is called."""
