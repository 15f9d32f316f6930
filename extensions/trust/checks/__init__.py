"""What `Hub.verify` may look at beside: checks of the records of all adapters."""
