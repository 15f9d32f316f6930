from loraweave.extensions.recipes.cluster_gates import experts_for as experts_for
from loraweave.extensions.recipes.cluster_gates import fit_clusters as fit_clusters
from loraweave.extensions.recipes.limited_gate import LimitedGate as LimitedGate
from loraweave.extensions.recipes.other_options import federated_average as federated_average
from loraweave.extensions.recipes.other_options import with_options as with_options
from loraweave.extensions.recipes.other_options import with_task as with_task
