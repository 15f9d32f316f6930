"""Forms in which the experts of these recipes enter the output of a place; one file each."""
