_tightrope() {
    # Bash splits words at `:` and `=`, which names of images, files in VMs and options contain: they are put together again.
    local IFS=$' \t\n' rest="${COMP_LINE:0:COMP_POINT}" i word part
    local words=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        part="${COMP_WORDS[i]}"
        word="${rest#"${rest%%[![:space:]]*}"}"
        [[ $i -eq $COMP_CWORD ]] && part="$word"
        if [[ $i -gt 0 && "$word" == "$rest" ]]; then
            words[${#words[@]} - 1]+="$part"
        else
            words+=("$part")
        fi
        rest="${word#"$part"}"
    done
    local last="${words[${#words[@]} - 1]}"
    local before="${last%"${last##*[:=]}"}"
    IFS=$'\013'
    COMPREPLY=($(
        _CLAP_IFS="$IFS" _CLAP_COMPLETE_INDEX=$((${#words[@]} - 1)) TIGHTROPE_COMPLETE=bash "$1" -- "${words[@]}" 2>/dev/null
    ))
    if [[ $? -ne 0 ]]; then
        unset COMPREPLY
        return
    fi
    [[ "${COMPREPLY-}" =~ [=/:]$ ]] && compopt -o nospace 2>/dev/null
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o bashdefault -o nosort -F _tightrope tightrope 2>/dev/null || complete -o bashdefault -F _tightrope tightrope
