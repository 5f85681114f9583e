# Sourced by the shell scripts: `ensure_venv FILE...` makes .venv once and installs each requirements file when it changes.
# Set VENV to use another folder.

VENV="${VENV:-.venv}"

ensure_venv() {
  local file stamp
  # pip's own script comes last: a kill before it leaves a python without pip, beside which it is made again
  if [ ! -x "$VENV/bin/python" ] || [ ! -x "$VENV/bin/pip" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("error: Python 3.11 or newer is needed; set PYTHON to one" if sys.version_info < (3, 11) else 0)'
    echo "making the virtual environment $VENV"
    "${PYTHON:-python3}" -m venv "$VENV"
  fi
  for file in "$@"; do
    stamp="$VENV/installed-$file"
    if ! cmp -s "$file" "$stamp"; then
      echo "installing $file"
      "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
      cp "$file" "$stamp"
    fi
  done
}
