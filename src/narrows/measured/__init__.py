"""What published measurements say, and what the cost model says about the same rows: one module for each kind of table."""
