"""Workers of a cluster, for work that falls apart into pieces; a file is named for the first word of joblib's backend."""
