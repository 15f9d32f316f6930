"""What routers share that look at the input: whose experts they are for, how they choose, how they are kept and trained."""
