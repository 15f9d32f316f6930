from loraweave.extensions.engines.folders import Folder as Folder
from loraweave.extensions.engines.folders import Folders as Folders
from loraweave.extensions.engines.loading import load as load
from loraweave.extensions.engines.loading import unload as unload
