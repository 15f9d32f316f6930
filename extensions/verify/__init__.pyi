from loraweave.extensions.verify.answers import Finding as Finding
from loraweave.extensions.verify.answers import ServerReport as ServerReport
from loraweave.extensions.verify.verify import verify_server as verify_server
