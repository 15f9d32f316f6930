from loraweave.extensions.ui.app import make_ui as make_ui
from loraweave.extensions.ui.app import make_ui_server as make_ui_server
