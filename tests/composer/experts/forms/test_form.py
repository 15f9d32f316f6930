"""The hooks that every form of experts defines."""

import pytest

from loraweave.composer.experts.forms._form import Form
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site


@pytest.mark.parametrize("missing", ["sites", "reset"])
def test_a_form_without_a_hook_that_all_forms_need_cannot_be_made(missing):
    hooks = {"sites": staticmethod(lambda model, recipe: []), "reset": lambda self, starts: None}
    arguments = Recipe(), Site("layer", 3, 5), ExpertShape((2,))
    assert type("Whole", (Form,), hooks)(*arguments).site.name == "layer"
    del hooks[missing]
    with pytest.raises(TypeError, match=f"abstract method '?{missing}'?"):
        type("Partial", (Form,), hooks)(*arguments)
