"""The page of the tour: the task that its code reads is one of those that come with the repository."""


def test_the_code_of_the_page_runs(run_page):
    unseen = run_page("docs/extensions/tour.md")["unseen"]
    assert (unseen.name, len(unseen.task.examples), len(unseen.test)) == ("pick_color_5", 5, 50)
