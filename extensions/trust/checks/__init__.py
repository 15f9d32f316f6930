"""Checks for `Hub.verify(also=..)` on the records of all adapters."""
