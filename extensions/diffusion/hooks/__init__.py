"""The hook that pipelines bring: a mixture for each call of their parts."""
