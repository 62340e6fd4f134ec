import pytest

from srlm_fast.errors import UserError
from srlm_fast.prompts.task_list import load_task_list, one_line, task_list_names

GOOD = 'heading: go\nitem: "- {task}"\nseparator: "\\n"\nplace: user\n'


def test_shipped_lists_load():
    assert task_list_names() == ["sandbox", "tasks"]


def test_tasks_stand_in_the_user_turn_and_go_on_with_item_nine():
    tasks = load_task_list("tasks")
    [(role, content)], prefill = tasks.start([f"Do {n}" for n in "abcdefgh"])
    assert role == "user"
    assert content.startswith(tasks.heading.strip() + "\n\n1. Do a\n2. Do b\n")
    assert content.endswith("\n8. Do h")
    assert prefill == "9."


def test_sandbox_list_is_the_models_own_turn():
    [message], prefill = load_task_list("sandbox").start(["sort a b", "swap c d"])
    assert message == ("user", "come up with new tasks")
    assert prefill == "task : sort a b ; task : swap c d ; task :"


@pytest.mark.parametrize(
    ("name", "completion", "tasks"),
    [
        ("tasks", " Write a poem\n10. Add two and two", ["Write a poem", "Add two and two"]),
        ("tasks", " Write\n  a poem\n\n10.  Add\n", ["Write a poem", "Add"]),
        ("tasks", " Round this number:\n3.5\n10. Add", ["Round this number: 3.5", "Add"]),
        ("tasks", " Name section 3. Then stop", ["Name section 3. Then stop"]),
        ("tasks", " Write a poem\n\nHere you are!", ["Write a poem"]),
        ("tasks", " Write a poem\n10.", ["Write a poem", ""]),
        ("tasks", "", [""]),
        ("sandbox", " sort a b ; task : swap c d", ["sort a b", "swap c d"]),
        ("sandbox", "sort a b ;", ["sort a b"]),
        ("sandbox", " sort a b ; task :", ["sort a b", ""]),
        ("sandbox", " sort ; swap task : b", ["sort ; swap task : b"]),
    ],
)
def test_reads_the_tasks_back(name, completion, tasks):
    assert load_task_list(name).tasks(completion) == tasks


@pytest.mark.parametrize("name", ["tasks", "sandbox"])
def test_what_is_written_can_be_read(name):
    form = load_task_list(name)
    _, before = form.start(["a b", "c {number}"])
    [user_turn], whole = form.start(["a b", "c {number}", "d {task} e", "f g"])
    text = whole if form.place == "assistant" else user_turn.content
    assert form.tasks(text)[-2 if form.place == "user" else -3 :][:2] == ["d {task} e", "f g"]
    assert before


def test_the_item_to_stop_at():
    assert load_task_list("tasks").stop(16) == ("\n16.",)
    assert load_task_list("sandbox").stop(16) == (), "its items are not numbered"


def test_one_line():
    assert one_line(" a\n\tb  c ; ", " ; ") == "a b c"
    assert one_line("a;b", "\n") == "a;b"


def test_user_file(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(GOOD)
    prompt, prefill = load_task_list(str(path)).start(["a"])
    assert (prompt[0].content, prefill) == ("go\n\n- a", "-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heading: [", "not YAML"),
        ("place: 2024-13-45", "not YAML"),
        ("just text", "exactly the keys"),
        (GOOD + "1: more", "exactly the keys"),
        (GOOD + "more: 1", "exactly the keys"),
        (GOOD.replace("heading: go\n", ""), "exactly the keys"),
        (GOOD.replace("go", "7"), "strings"),
        (GOOD.replace("{task}", "task"), "one {task}"),
        (GOOD.replace("- {task}", "{task}"), "a mark"),
        (GOOD.replace("user", "system"), "user or assistant"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_task_list(str(path))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean tasks"):
        load_task_list("task")
    with pytest.raises(UserError, match=r"no\.yaml does not exist; give a file or one of sandbox"):
        load_task_list(str(tmp_path / "no.yaml"))


def test_unreadable_file_is_named(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_bytes(GOOD.replace("go", "caf\xe9").encode("latin-1"))
    with pytest.raises(UserError, match=f"cannot read {path}: .*UTF-8"):
        load_task_list(str(path))
