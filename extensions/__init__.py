"""Extensions: each folder answers one question that some users have, and any of them may be missing.

An extension imports `loraweave`, `loraweave.extend` and itself, no other room and no other extension. A package in it is the
folder of a registry (`methods`, `recipes`, ..), `commands.py` has its verbs for the shell.
"""
