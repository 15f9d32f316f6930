"""Strategies of federation, one file each: what clients receive, how they train, and how their updates are aggregated."""
