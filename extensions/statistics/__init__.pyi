from loraweave.extensions.statistics.collecting import collect_statistics as collect_statistics
from loraweave.extensions.statistics.collecting import record_inputs as record_inputs
from loraweave.extensions.statistics.pooling import pool_statistics as pool_statistics
from loraweave.extensions.statistics.saved import LayerStatistics as LayerStatistics
from loraweave.extensions.statistics.saved import Statistics as Statistics
