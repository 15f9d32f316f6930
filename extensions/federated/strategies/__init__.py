"""Strategies of federation, one file each: how a round begins on a client, and what becomes of the updates."""
