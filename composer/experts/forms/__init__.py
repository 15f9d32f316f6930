"""The forms of experts, one file each: the formulas by which experts change a site's output."""
