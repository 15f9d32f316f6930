"""Further checks that `Hub.verify` may make, of the records of all adapters."""
