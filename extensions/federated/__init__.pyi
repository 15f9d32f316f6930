from loraweave.extensions.federated.federation import Federated as Federated
from loraweave.extensions.federated.federation import federate as federate
from loraweave.extensions.federated.methods.flexlora import flexlora_clients as flexlora_clients
from loraweave.extensions.federated.private import PrivateDevice as PrivateDevice
from loraweave.extensions.federated.private import Traffic as Traffic
from loraweave.extensions.federated.private import serve_base as serve_base
from loraweave.extensions.federated.private import split_adapter as split_adapter
