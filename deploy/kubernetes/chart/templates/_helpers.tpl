{{- define "lorafleet.labels" -}}
app.kubernetes.io/name: lorafleet
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* (dict "root" $ "component" NAME) */}}
{{- define "lorafleet.selector" -}}
app.kubernetes.io/name: lorafleet
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "lorafleet.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* What is the same in each pod's spec. */}}
{{- define "lorafleet.podSpec" -}}
serviceAccountName: {{ .Release.Name }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* What is the same in each container. */}}
{{- define "lorafleet.container" -}}
image: {{ include "lorafleet.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* The model's path in the pods. The demo model's name says which file it was made of; examples/demo_model.py. */}}
{{- define "lorafleet.modelPath" -}}
{{- if .Values.model.demo -}}
/cache/models/SmolLM2-135M-Instruct-b179c9523d0e
{{- else -}}
{{ required "model.path is empty; give the model's directory below /models, or set model.demo" .Values.model.path }}
{{- end -}}
{{- end }}

{{/* What is needed to read models and adapters: of a container. */}}
{{- define "lorafleet.modelMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/lorafleet}
- {name: cache, mountPath: /cache}
- {name: shared-memory, mountPath: /dev/shm}
- {name: flags, mountPath: /etc/lorafleet, readOnly: true}
{{- if .Values.model.claim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if .Values.adapters.claim }}
- {name: adapters, mountPath: /adapters, readOnly: true}
{{- end }}
{{- end }}

{{/* (dict "root" $ "sharedMemory" SIZE): the same, of a pod. */}}
{{- define "lorafleet.modelVolumes" -}}
{{- $values := .root.Values -}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
- name: cache
  emptyDir: {sizeLimit: {{ $values.cache }}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .sharedMemory }}}
- name: flags
  configMap: {name: {{ .root.Release.Name }}-flags}
{{- with $values.model.claim }}
- name: models
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- with $values.adapters.claim }}
- name: adapters
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}

{{/* Fetches the demo model into the pod's cache. */}}
{{- define "lorafleet.demoModel" -}}
{{- if .Values.model.demo }}
initContainers:
  - name: demo-model
    {{- include "lorafleet.container" . | nindent 4 }}
    command: [python, /opt/lorafleet/examples/demo_model.py]
    resources:
      requests: {cpu: 500m, memory: 2Gi}
      limits: {cpu: "1", memory: 2Gi}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: home, mountPath: /home/lorafleet}
      - {name: cache, mountPath: /cache}
{{- end }}
{{- end }}

{{- define "lorafleet.raySettings" -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
{{- end }}

{{- define "lorafleet.checked" -}}
{{- if and .Values.model.claim .Values.model.demo }}{{ fail "model.claim and model.demo are both given; choose one" }}{{ end -}}
{{- if not (or .Values.model.claim .Values.model.demo) }}{{ fail "give model.claim, a PersistentVolumeClaim with the model, or set model.demo" }}{{ end -}}
{{- if eq .Values.mode "cluster" -}}
{{- $gpus := 0 -}}{{- $cpus := 0 -}}
{{- range .Values.workerGroups -}}
{{- $gpus = add $gpus (mul .replicas .gpus) -}}
{{- $cpus = add $cpus (mul .replicas (int .cpu)) -}}
{{- end -}}
{{- $ranks := mul .Values.workers.count .Values.workers.tensorParallelSize -}}
{{- $places := ternary $gpus $cpus (gt (int $gpus) 0) -}}
{{- if gt (int $ranks) (int $places) -}}
{{- fail (printf "workers.count %d of workers.tensorParallelSize %d need %d places; workerGroups have %d %s. Raise replicas, or lower one of them" (int .Values.workers.count) (int .Values.workers.tensorParallelSize) (int $ranks) (int $places) (ternary "GPUs" "CPUs" (gt (int $gpus) 0))) -}}
{{- end -}}
{{- if and (eq .Values.faultTolerance.backend "redis") (not .Values.faultTolerance.redisAddress) }}{{ fail "faultTolerance.backend is redis; give faultTolerance.redisAddress" }}{{ end -}}
{{- end -}}
{{- end }}
