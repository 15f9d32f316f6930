from loraweave.extensions.upkeep.from_blobs import rebuild as rebuild
