"""Options: a dataclass, then Python config files, then the command line.

    python train.py config/quickstart.py --lr=1e-3 --schedule constant --compile

Every option is a field of one dataclass. Its type is its annotation, its default
is its value, and the comment after it is what `--help` prints. Config files hold
plain Python assignments (`batch_tokens = 8 * 1024`); later files win over earlier
ones, and the command line wins over all files. Functions and classes in a config file
are not options: a file may define a structure of your own (theta.Structure).
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import shlex
import signal
import sys
import time
import types
import typing


def on_one_line(text, most=2000):
    """The text with line breaks as spaces and other control characters escaped; its middle is left out if it is very long."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in str(text))
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"


PATIENCE = 5  # seconds that torchrun may need to end the ranks of a run after the first has failed


class OneLineExit(SystemExit):
    """Uncaught, it ends the program with one line on stderr, exit status 1 and no traceback.

    Python prints the line on rank 0 of a distributed run only. `spoken`: another rank has printed it already.
    """

    spoken = False

    def __init__(self, message):
        rank = os.environ.get("RANK", "0")
        self.message = on_one_line(message)
        super().__init__(1 if rank.isdecimal() and int(rank) else f"error: {self.message}")

    def __str__(self):
        return self.message


class RunFailed(OneLineExit, RuntimeError):
    """A run with correct options that cannot continue: its loss is not finite, or a disk or the GPU is full.

    The one line states what happened, what is saved and what to do. Code may catch it as RuntimeError.
    """


class ConfigError(OneLineExit, ValueError):
    """A user's mistake. The one line names option, value and remedy. Code may catch it as ValueError."""

    def about(self, what):
        """The same error, its message prefixed with what it is about."""
        return type(self)(f"{what}: {self.message}")


class UnusedOption(ConfigError):
    """An option that has no effect given the others. If it comes from a config file, load_config drops it with a note."""

    def __init__(self, option, value, why, remedy="leave it out", where=""):
        """why: text that follows option and value, such as " with structure='dense', which has none"."""
        super().__init__(f"{where}{option}={value}{why}: {remedy}")
        self.option, self.value, self.why, self.remedy = option, value, why, remedy

    def about(self, what):
        return UnusedOption(self.option, self.value, self.why, self.remedy, f"{what}: ")


def is_out_of_memory(error):
    """Whether an exception tells that memory, of the CPU or a GPU, does not suffice for what was asked."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "CUDA out of memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


def as_script(main):
    """Call main(command-line arguments). An uncaught Ctrl-C prints one line and exits with 130; a closed pipe (`| head`) is no error.

    Whatever a script has not foreseen of its surroundings is one line, too: too little memory, a file or stdout that fails.
    """
    with contextlib.suppress(AttributeError):  # of a stdout that is closed, or takes all characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()  # while its failure can be one line
    except OneLineExit as error:
        # Machines, and ranks, may be given other options than rank 0's. On each machine the first rank speaks at once;
        # another, unless torchrun ends it before, because all have met the same mistake.
        if error.code == 1 and "LOCAL_RANK" in os.environ and not error.spoken:
            print_for_rank(error, os.environ["RANK"], PATIENCE if os.environ["LOCAL_RANK"] != "0" else 0)
        raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:  # torch has no class for a CPU's memory
        if isinstance(error, OneLineExit) or not is_out_of_memory(error):
            raise
        raise RunFailed(f"out of memory ({on_one_line(error, 200) or 'Python objects'}): make sizes smaller") from None
    except BrokenPipeError:  # the reader of the output has closed the pipe
        give_up_stdout()
        raise SystemExit(141) from None  # 128 + SIGPIPE, as a shell reports it
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        if error.filename is None:  # of print
            give_up_stdout()
        what = "stdout" if error.filename is None else os.fsdecode(error.filename)
        raise RunFailed(f"{what} cannot be used ({error.strerror})") from None


def print_for_rank(error, rank, seconds):
    """Print the line of a OneLineExit for another rank than 0, for which Python prints none.

    Other ranks may have met the same error: in that case torchrun ends this process within these seconds, and the line
    appears once.
    """
    if seconds:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(seconds)
    print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    error.spoken = True


def give_up_stdout():
    """Make /dev/null take what stdout still holds, and Python would complain about when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choose_command(argv, commands, script, question, doc):
    """commands[argv[0]] of a script with several commands. --help prints `doc` and exits; an unknown command is a ConfigError."""
    if argv[:1] in (["--help"], ["-h"]):
        print(f"{doc.strip()}\n\n--help after a command prints its options.")
        raise SystemExit(0)
    if not argv or argv[0] not in commands:
        raise ConfigError(f"{' '.join([script, *argv[:1]])}: {question}, {' or '.join(commands)}")
    return commands[argv[0]]


def load_config(Config, argv):
    """Build the dataclass `Config` from `argv`, the arguments after the program's name.

    Config files (`*.py`) are read first, in order, then `--key=value`, `--key value` and
    bare `--flag`. Raises ConfigError for an unknown key or a value of the wrong type;
    `Config.__post_init__` should raise ConfigError too for whatever it rejects. An option that has no effect
    (UnusedOption) is dropped with a note if a config file gives it, and is an error on the command line.

    A script calls this twice, before its slow imports and in its main. The second call returns what the first made.
    """
    if (Config, *argv) in _loaded:
        return _loaded.pop((Config, *argv))
    if "--help" in argv or "-h" in argv:
        print(help_text(Config), flush=True)
        raise SystemExit(0)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    hints = typing.get_type_hints(Config)
    files, flags = _split_argv(argv, fields, hints, Config)
    values = {}
    for path in files:
        for key, value in read_config_file(path).items():
            values[key] = _checked(key, value, fields, hints, where=f"{path}: ", Config=Config)
    from_files = set(values) - {key for key, _ in flags}
    for key, text in flags:
        _check_key(key, fields, Config=Config)
        values[key] = _checked(key, _parse(text, hints[key]), fields, hints, where="--")
    while True:
        try:
            config = Config(**values)
            if _runs_a_script():
                _loaded[Config, *argv] = config
            return config
        except UnusedOption as error:
            if error.option not in from_files or values.get(error.option) != error.value:
                raise
            if os.environ.get("RANK", "0") == "0":
                print(f"note: {error.option}={error.value}{error.why}: left out", flush=True)
            del values[error.option]


_loaded = {}  # (dataclass, *command line): the config of a script's first call of load_config, for its second


def _runs_a_script():
    """Whether the main module is a script of this project, which calls load_config twice."""
    return hasattr(sys.modules["__main__"], "as_script")


def help_text(Config):
    """One line for each option: name, default and the comment on its field. Options in Config.hidden are left out."""
    comments, hidden = _field_comments(Config), getattr(Config, "hidden", ())
    module = sys.modules["__main__" if _runs_a_script() else Config.__module__]
    lines = [inspect.cleandoc(module.__doc__ or ""), "", "options:"]
    for field in dataclasses.fields(Config):
        if field.name in hidden:
            continue
        option = f"--{field.name}={field.default!r}"
        lines.append(f"  {option:<36} {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def _field_comments(Config):
    """{field name: comment after it}, for the dataclass and its bases."""
    comments = {}
    for cls in reversed(Config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        for line in inspect.getsource(cls).splitlines():
            code, _, comment = line.partition("  # ")
            name = code.partition(":")[0].strip()
            if comment and name.isidentifier():
                comments[name] = comment.strip()
    return comments


def _split_argv(argv, fields, hints, Config):
    """-> config file paths, [(key, text)]"""
    files, flags, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if not word.endswith(".py"):
                raise ConfigError(f"'{word}' is neither a config file (*.py) nor an option (--key=value)")
            files.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            _check_key(key, fields, Config=Config)
            if hints[key] is bool or bool in typing.get_args(hints[key]):  # bare, or followed by its value
                text = rest.pop(0) if rest and rest[0].lower() in ("true", "false", "none") else "True"
            elif not rest or (rest[0].startswith("--") and hints[key] is not str):
                raise ConfigError(f"--{key} needs a value, such as --{key}={fields[key].default!r}")
            else:
                text = rest.pop(0)
                if tuple in (hints[key], *typing.get_args(hints[key])):  # --theta .5 0 .5 0 .5 .5 0
                    while rest and not rest[0].startswith("--") and not rest[0].endswith(".py"):
                        text += " " + rest.pop(0)
        flags.append((key, text))
    return files, flags


def read_config_file(path):
    """Run a config file -> {name: value} of its assignments, without modules, functions, classes and _names.

    The file becomes a module, so that torch.compile finds the names that a layer defined in it uses.
    """
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"config file {path} {what}")
    module = types.ModuleType("config_file_" + re.sub(r"\W", "_", path))
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), vars(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # exit() too, which would end the script with status 0
        raise ConfigError(f"config file {path} does not run: {describe_error(error)}") from error
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)
    }


def describe_error(error):
    """Kind and message of an exception whose message may raise another, as that of a class in a config file."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return "it calls exit()"
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


# ---------------------------------------------------------------------------------------
# Options inside an option, written as on a command line, such as --against="config/gpt2_dense.py --rank=2; …"


def split_words(option, text):
    """The words of `text`, split as by a shell. A ConfigError calls the text `option`."""
    return sum(split_configs(option, text, separator=""), [])


def split_configs(option, text, separator=";"):
    """Words of several configs separated by ';': "config/a.py --rank=2; config/b.py" -> [["config/a.py", "--rank=2"], …].

    Words are split as by a shell, and ';' inside quotes does not separate. Empty configs are left out.
    """
    reader = shlex.shlex(text, posix=True, punctuation_chars=separator)
    reader.whitespace_split, reader.commenters = True, ""
    try:
        words = list(reader)
    except ValueError as error:
        raise ConfigError(f"{option}={text!r}: {str(error).lower()}, close the quotes") from None
    configs = [[]]
    for word in words:
        if separator and set(word) == {separator}:
            configs.append([])
        else:
            configs[-1].append(word)
    return [config for config in configs if config]


def split_options(option, text):
    """'--key=value --key value --flag' -> {key: value}. A value that is not a Python literal is text, a flag is True."""
    options, words = {}, split_words(option, text)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{option}={text!r}: {word!r} is not an option, write each as --key=value")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "True"
        options[key] = _parse(value, object)
    return options


def _check_key(key, fields, where="--", Config=None):
    if key not in fields:
        here = getattr(Config, "elsewhere", {}).get(key)
        if here:
            raise ConfigError(f"unknown option {where}{key}: here it is {here}")
        near = difflib.get_close_matches(key, fields, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else "--help lists the options"
        raise ConfigError(f"unknown option {where}{key}: {remedy}")


def _parse(text, hint):
    """Command-line text -> Python value. Text that is not a literal stays a string; so does the text of a `str` option."""
    kinds = set(typing.get_args(hint) if _is_union(hint) else (hint,))
    if str in kinds and not (types.NoneType in kinds and text == "None") and not (bool in kinds and _is_bool(text)):
        return text
    if _is_bool(text):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # TypeError: of {[]: 1}
        return text


def _is_bool(text):
    return text.lower() in ("true", "false")


def _checked(key, value, fields, hints, where, Config=None):
    """`value` converted to the option's type, or ConfigError."""
    _check_key(key, fields, where, Config)
    value = _converted(key, value, hints[key], where)
    _check_numbers(key, value, where)
    return value


def _check_numbers(key, value, where):
    """ConfigError for NaN, infinity and whole numbers that 64 bits do not hold, inside tuples and dicts too."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}{key}={value} is not finite: give another number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        shown = value if value.bit_length() < 128 else f"(a number of {value.bit_length()} bits)"
        raise ConfigError(f"{where}{key}={shown} does not fit in 64 bits: give a number between -2^63 and 2^63")
    if isinstance(value, (tuple, list, dict)):
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_numbers(key, each, where)


def _converted(key, value, hint, where):
    for option in typing.get_args(hint) if _is_union(hint) else (hint,):
        kind = typing.get_origin(option) or option
        if kind is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif kind in (tuple, list) and isinstance(value, (tuple, list)):
            return kind(value)
        elif kind is tuple and isinstance(value, str):  # --structured_layers=ffn,attn or --theta ".5 0 .5"
            return tuple(_parse(word, object) for word in value.replace(",", " ").split())
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value) if abs(value) < 2**63 else value  # _check_numbers refuses it
        elif kind is int and isinstance(value, float) and value.is_integer():
            return int(value)  # --max_steps=1e4
        elif isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
            return value
    literals = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is typing.Literal]
    choices = [str(choice) for kind in literals for choice in typing.get_args(kind)]
    near = difflib.get_close_matches(str(value), choices, n=1)
    wrong = "is unknown" if choices and isinstance(value, str) else "has the wrong type"
    remedy = f"did you mean {near[0]!r}? give" if near else "give"
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "…"
    raise ConfigError(f"{where}{key}={shown} {wrong}: {remedy} {_describe(hint)}")


def _is_union(hint):
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _describe(hint):
    if _is_union(hint):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if hint is types.NoneType:
        return "None"
    kind = typing.get_origin(hint) or hint
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}.get(
        kind, f"a {kind.__name__}"
    )
