# A server on the default model for the scripts below this folder; they read this file.

# start_server MOEWE LOG [ARGS]: sets base, its address, and server, its process.
start_server() {
    moewe=$1 log=$2
    shift 2
    "$moewe" serve --port 0 "$@" 2>"$log" &
    server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    while ! base=$(sed -n 's/^serving .* on \(http:.*\)/\1/p' "$log" | grep .); do
        kill -0 $server 2>/dev/null || { cat "$log" >&2 && exit 1; }
        sleep 0.1
    done
}

# Ends the server as a supervisor does; fails if it does not end well.
stop_server() {
    kill $server
    wait $server || { echo 'the server failed:' >&2 && cat "$log" >&2 && return 1; }
}

# install_node_packages FOLDER TARGET: those of FOLDER/package.json into TARGET, once.
install_node_packages() {
    if ! cmp -s "$1/package.json" "$2/package.json"; then
        mkdir -p "$2"
        cp "$1/package.json" "$2"
        (cd "$2" && npm install --silent --no-audit --no-fund) ||
            { rm "$2/package.json" && return 1; }
    fi
}
