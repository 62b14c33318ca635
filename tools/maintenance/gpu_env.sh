# Sourced by the scripts that run on a GPU machine. It puts the checkout on
# PYTHONPATH and defines gpu_python.
GPU_ENV_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$GPU_ENV_ROOT${PYTHONPATH:+:$PYTHONPATH}"

# gpu_python WHEELS_DIR
#
# Prints the Python interpreter to use: ${PYTHON:-python3} where there is no
# folder WHEELS_DIR, else that of a virtual environment in a temporary place
# that sees the packages of ${PYTHON:-python3} and, before them, all wheels of
# the folder. Nothing is downloaded, no dependency is resolved, and the same
# folder gives the same environment again, at once. What pip says goes to
# stderr; the status is that of the set-up.
gpu_python() {
    local wheels=$1 python=${PYTHON:-python3} key place names
    python=$(command -v "$python") || {
        echo "gpu_python: no interpreter '${PYTHON:-python3}'; set PYTHON" >&2
        return 1
    }
    if [ ! -d "$wheels" ]; then
        echo "gpu_python: no folder '$wheels', using $python as it is" >&2
        echo "$python"
        return
    fi
    wheels=$(cd "$wheels" && pwd)
    # A folder may hold builds for several Pythons: pip picks by name.
    names=$(cd "$wheels" && ls -- *.whl 2> /dev/null | cut -d- -f1 | sort -u)
    if [ -z "$names" ]; then
        echo "gpu_python: '$wheels' holds no wheel (*.whl); fill it with" \
            "tools/maintenance/pack_wheels.sh, or name a folder that does not exist" \
            "to use $python as it is" >&2
        return 1
    fi
    key=$({ echo "$python"; ls -l -- "$wheels"; } | cksum | cut -d' ' -f1)
    place=${TMPDIR:-/tmp}/convnext_mm-$(id -u)/env-$key
    if [ ! -e "$place/ready" ]; then
        rm -rf "$place"
        mkdir -p -m 700 "${place%/*}" \
            && "$python" -m venv --without-pip "$place" >&2 \
            && "$python" -m pip --python "$place/bin/python" install --quiet \
                --disable-pip-version-check --no-index --no-deps \
                --no-cache-dir --find-links "$wheels" $names >&2 \
            && _gpu_env_inherit "$python" "$place/bin/python" \
            && _gpu_env_operators "$place/bin/python" "$names" \
            && touch "$place/ready" || {
            echo "gpu_python: the wheels of '$wheels' could not be" \
                "installed for $python: see pip's message above" >&2
            return 1
        }
    fi
    echo "$place/bin/python"
}

# _gpu_env_operators PYTHON NAMES: an mmcv among the wheels NAMES that has no
# operators, or none that import, gets those on torchvision.
_gpu_env_operators() {
    case $2 in
        *mmcv*) "$1" "$GPU_ENV_ROOT/convnext_mm/compat/mmcv_ops/__main__.py" >&2 ;;
    esac
}

# _gpu_env_inherit FROM TO: TO sees FROM's packages after its own. Unlike
# `venv --system-site-packages` this works where FROM is a virtual environment
# itself.
_gpu_env_inherit() {
    local folders
    mapfile -t folders < <("$1" -c 'if True:
        import site, sys
        known = [*site.getsitepackages(), site.getusersitepackages()]
        print(*(folder for folder in known if folder in sys.path), sep="\n")')
    "$2" -c 'if True:
        import pathlib, sys, sysconfig
        place = pathlib.Path(sysconfig.get_paths()["purelib"])
        (place / "inherited.pth").write_text("".join(
            f"import site; site.addsitedir({folder!r})\n"
            for folder in sys.argv[1:]))
        ' "${folders[@]}"
}
