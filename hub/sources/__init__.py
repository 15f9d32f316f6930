"""Where adapters come from: folders, files and archives of this machine, and repositories of the model hub."""
