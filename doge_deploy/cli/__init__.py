"""The command line; the only room that imports click. One command a file, loaded when it is called."""
