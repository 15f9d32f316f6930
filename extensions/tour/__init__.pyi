from loraweave.extensions.tour.demonstration import DemoTask as DemoTask
from loraweave.extensions.tour.demonstration import load_task as load_task
from loraweave.extensions.tour.demonstration import read_rows as read_rows
