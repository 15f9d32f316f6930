from loraweave.extensions.trust.checks.signed_by import signed_by as signed_by
from loraweave.extensions.trust.signatures import sign as sign
