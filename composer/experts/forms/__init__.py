"""The forms of experts, by which they enter a site's output; one file each."""
