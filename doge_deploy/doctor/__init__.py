"""What this machine has, what devices can do, and whether a model fits; nothing here loads a vendor's library."""
