"""Forms, one file each, in which the experts of these recipes enter the output of a layer or block."""
