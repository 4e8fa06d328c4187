# Sourced by up.sh and down.sh.

# alive NAME: the process recorded as NAME runs that program; a zombie, which init may leave for long, does not
alive() {
    local pid command state
    pid=$(cat "$ROOT/run/$1.pid" 2>/dev/null) || return 1
    read -r _ command state _ 2>/dev/null <"/proc/$pid/stat" || return 1
    [ "$command" = "($1)" ] && [ "$state" != Z ]
}
