from loraweave.extensions.adapter_types.formats.compeft import Compeft as Compeft
