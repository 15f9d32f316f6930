"""Where the experts of a pool are: on disk, on the host, on the devices, within budgets."""
