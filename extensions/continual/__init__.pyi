from loraweave.extensions.continual.course import own_parts as own_parts
from loraweave.extensions.continual.course import train_in_order as train_in_order
from loraweave.extensions.continual.documents import remember as remember
from loraweave.extensions.continual.kinds import Beside as Beside
from loraweave.extensions.continual.kinds import Linearized as Linearized
from loraweave.extensions.continual.kinds import tangent as tangent
