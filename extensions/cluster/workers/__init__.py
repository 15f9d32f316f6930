"""Workers of a cluster, for work in independent pieces; a file has the first word of joblib's backend as its name."""
