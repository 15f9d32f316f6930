"""Both ways to the entries of an update, and adapters in a PEFT model."""

from entries_ways import entries_way as entries_way
from one_layer_in_peft import in_peft as in_peft
