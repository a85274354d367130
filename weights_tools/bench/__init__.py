"""How fast, and how near to what the machine can do. README.md has the results, SPEED.md what was tried."""
